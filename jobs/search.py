"""Ray Job entrypoint of `oml-ray search`, with the same arguments."""

from oml_ray.cli import job

if __name__ == "__main__":
    job("search")
