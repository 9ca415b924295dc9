"""Tables of many purifications: a plan of cells, a runner that can be stopped at any time, and what became of them."""
