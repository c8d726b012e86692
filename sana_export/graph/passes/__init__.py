"""Graph passes, one per file. Each takes an `ir.Model`, edits it in place and returns how often it fired."""
