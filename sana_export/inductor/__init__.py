"""The target `inductor`: the components as compiled pieces with our kernels, for the very machine that builds them."""
