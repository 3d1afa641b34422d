"""What the scripts of examples/ have in common. They are run from there: `import common` finds it."""
