"""What every training run has, whatever it trains: folder, log, checkpoints, optimiser, ZeRO."""
