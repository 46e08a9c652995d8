from dcod_jax.cli import main

main()
