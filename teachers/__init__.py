"""EP-CNN teachers: energy, relaxation, learning rules, gradients through the equilibrium."""
