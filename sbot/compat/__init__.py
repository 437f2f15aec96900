"""Names and units of other libraries over the solvers of sbot, one module for each library."""
