"""One file per verb of `sana-export`."""
