{# All rows by one workgroup; or `each` rows per workgroup, into a row of `parts`; or the sum of those parts. #}
// Number of counted targets and their mean loss.
{# Inside: row < rows, the number of targets and of columns of rows, whose second row begins at its stride. Loss and count have one vec4
   each. #}
{% include "shared/group" %}
{% include "shared/reduce" %}
{% if not from_parts %}

fn of_row(row: u32) -> vec4<f32> {
    let target_id = targets_at(row);
    let counts = target_id < {{ vocabulary }}u{% if ignore >= 0 %} && target_id != {{ ignore }}u{% endif %};
    return vec4<f32>(rows_at(rows_stride + row), select(0.0, 1.0, counts), 0.0, 0.0);
}

{% include "shared/shares" %}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let sums = {% if from_parts %}parts_load(0u){% else %}share(group_id(wid), lid){% endif %};
{% if groups > 1 %}
    store_part(group_id(wid), lid, sums);
{% else %}
    if (lid == 0u) {
        loss_store(0u, vec4<f32>(sums.x / max(sums.y, 1.0), 0.0, 0.0, 0.0));
        count_store(0u, vec4<f32>(sums.y, 0.0, 0.0, 0.0));
    }
{% endif %}
}
