"""Functions of the user in the place of a model, in processes of their own."""
