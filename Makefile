# fabricd: see README.md. `make lab` shows it, `make test` tests it.
