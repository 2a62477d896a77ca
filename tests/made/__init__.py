"""What tests share: small models, weights, plans, foreign files, commands."""
