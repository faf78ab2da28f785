"""What compute and transfers take: pure functions of frozen values; only `links` has a clock."""
