from dcod_jax.cli import run

run("init_student")
