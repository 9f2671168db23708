"""Feedforward students: architectures, fixed-point matching, distillation."""
