"""A datacentre in virtual time: the production processes on modelled nodes and links."""
