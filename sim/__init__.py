"""A cluster in one process and virtual time: the production code on modelled machines."""
