"""The only floor that imports ray: sessions, streams, training workers, actors and gallery shards."""
