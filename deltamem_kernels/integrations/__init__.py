"""Integrations with other packages. No other part of this package imports them."""
