"""One step, made of its phases: what it runs, the weights while they are perturbed, the batch, the noise."""
