from dcod_jax.cli import run

run("tune")
