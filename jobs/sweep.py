"""Ray Job entrypoint of `oml-ray sweep`, with the same arguments."""

from oml_ray.cli import job

if __name__ == "__main__":
    job("sweep")
