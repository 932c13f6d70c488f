"""What a run will take, before it is started: memory, time, money, checkpoints, data."""
