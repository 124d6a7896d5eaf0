"""The tuner types, one file a method; `import bem_peft` registers them with PEFT."""
