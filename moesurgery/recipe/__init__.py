"""Operations: their registry, their parameters, and the strict YAML that names them."""
