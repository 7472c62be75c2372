"""The training script: its arguments, launch, checkpoints, record and screen output."""
