"""The rivals: ordinary networks that are trained, evaluated and distilled from like an EP-CNN."""
