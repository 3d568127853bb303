"""The page on which an operator watches a fleet; served by the fleet's server, over the same port."""
