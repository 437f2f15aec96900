"""``python -m sbot migrate -- COMMAND``: a program run with its calls of POT and GeomLoss made on both sides and compared."""
