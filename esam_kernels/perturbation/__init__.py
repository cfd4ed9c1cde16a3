"""Stochastic Weight Perturbation (section 2.2): draw, norm, perturb, restore, restore and update."""
