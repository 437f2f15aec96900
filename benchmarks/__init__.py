"""Measurements: problems with known answers, contenders behind one call, a run, a report."""
