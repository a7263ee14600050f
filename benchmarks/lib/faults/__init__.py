"""What can go wrong, done on purpose: kills, flipped bits, full disks, bad visitors."""
