"""Feedforward students: architectures, matching to a teacher, distillation.

registry, backbones           backbones by name, and a user's own
convnets, torchvision_nets    the backbones themselves
tapping                       stages of any network that torch.fx can trace
pretrained                    weights to start from
spec, model                   what fixes a student, and the student
matching, inputs              the losses, and where in input space they are taken
cache                         a teacher's answers to replayed views, on disk
distill                       the training task
fidelity                      how a student stands to its teacher
"""
