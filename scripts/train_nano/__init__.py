"""Training of `nano`, the small Sana that is shipped."""
