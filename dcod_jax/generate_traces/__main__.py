from dcod_jax.cli import run

run("generate_traces")
