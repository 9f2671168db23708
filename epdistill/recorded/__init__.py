"""Results that are kept: small sealed files, and the page and pictures made from them alone."""
