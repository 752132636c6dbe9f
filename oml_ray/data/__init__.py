"""The data floor: tables of instances, batch plans, image decoding and transforms."""
