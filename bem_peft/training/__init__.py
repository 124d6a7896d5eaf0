"""Training with the methods: parameter groups, a Trainer, checkpoints that a kill cannot spoil."""
