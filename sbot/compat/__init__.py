"""Drop-in replacements: foreign names, units and shapes live here and nowhere else."""
