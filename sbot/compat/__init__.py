"""Drop-in functions for other libraries: a compat module translates names, units and shapes, and computes nothing."""
