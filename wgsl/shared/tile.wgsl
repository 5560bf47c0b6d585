{# In `main`: column, row and layer of the tile that this workgroup computes. Surplus workgroups of a folded grid leave, whole. #}
{% if folded %}
    let number = group.y * {{ grid_x }}u + group.x;
    let wid = vec3<u32>(number % {{ grid_columns }}u, number / {{ grid_columns }}u % {{ grid_rows }}u, number / {{ grid_columns * grid_rows }}u);
    if (wid.z >= {{ grid_layers }}u) {
        return;
    }
{% else %}
    let wid = group;
{% endif %}
