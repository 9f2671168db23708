"""Honest robustness: attacks, corruptions, and one harness for torch models and ONNX files.

subjects      what is evaluated: a way to predict, and the gradients an attacker may use
guards        what every attack and every model must obey, checked and not assumed
attacks       PGD (Linf, L2) and Square (Linf) as pure functions
corruptions   CIFAR-10-C's constants, seeded, for any size and for grey or colour
suites        which attacks, which strengths, which corruptions
harness       `evaluate`: runs a suite over subjects
outcomes      what came out, image by image, and the worst case over attacks
intervals     how sure a share of n images is
results       results.json, results.csv and the accuracy plot
"""
