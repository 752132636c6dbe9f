"""Ray Job entrypoint of `oml-ray evaluate`, with the same arguments."""

from oml_ray.cli import job

if __name__ == "__main__":
    job("evaluate")
