"""Honest robustness: attacks, corruptions, and one harness for torch models and ONNX files.

subjects      what is evaluated: a way to predict, and the gradients an attacker may use
guards        what every attack and every model must obey, checked and not assumed
attacks       every attack as a pure function
corruptions   CIFAR-10-C's constants, seeded, for any size and for grey or colour
suites        which attacks, which strengths, which corruptions: `--suite quick`
full, paper   the other suites
harness       `evaluate`: runs a suite over subjects
attacking     its attacks, and what images crafted on one subject do to the others
crafted       such images on disk, for evaluations that share a subject
corrupting    its corruptions
temporal      its sweep over attack and prediction horizons
published     its cells of the published protocol
extras        its diagnosis of masked gradients (diagnostics) and basins
units         what is computed at once; journal remembers it if the process dies
outcomes      what came out, image by image, and the worst case over attacks
intervals     how sure a share of n images is; shares puts it beside the share
results       results.json, with the tables of published_table and transfer
paired        several models image by image, over seeds: means and differences
rows          results.csv; tables the results as text
drawing       the pictures of an evaluation, drawn by pictures
"""
