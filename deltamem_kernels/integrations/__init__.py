"""The memory inside other packages. Nothing else in this package imports these."""
