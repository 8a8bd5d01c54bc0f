"""Placeholder until the exporter lands."""


def exportable(config):
    """Which formats are possible."""
    return {"hf": None}
