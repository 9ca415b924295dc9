"""Other defences, to compare with: one module each, on the same clean images and with as many gradient evaluations."""
