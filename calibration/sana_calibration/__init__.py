"""Which layers are quantised, how, and with which scales: recipes, observers, fake quantisation."""
