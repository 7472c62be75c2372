"""`apo-trl bench`: a training step against stock TRL's."""
