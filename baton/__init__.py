"""baton: disaggregated LLM serving. The library that every process shares."""

__version__ = "0.1.0"
