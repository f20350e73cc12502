"""Old peers: Go guests and servers. Nobody else knows them."""
