{# All rows by one workgroup; or `each` rows per workgroup, into a row of `parts`; or the sum of those parts, `rows` being 1. #}
// Mean cosine, mean squared error, loss.
{# Inside: row < rows. The three scalars have one vec4 each. #}
{% include "shared/group" %}
{% include "shared/reduce" %}
{% if not from_parts %}

fn of_row(row: u32) -> vec4<f32> {
    let r = rows_load(row * rows_stride);
    return vec4<f32>(r.x / (r.y * r.z), r.w, 0.0, 0.0);
}

{% include "shared/shares" %}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let sums = {% if from_parts %}rows_load(0u){% else %}share(group_id(wid), lid){% endif %};
{% if groups > 1 %}
    store_part(group_id(wid), lid, sums);
{% else %}
    let cosine = sums.x / {{ samples }}.0;
    let mse = sums.y / {{ elements }}.0;
    if (lid == 0u) {
        loss_store(0u, vec4<f32>({{ alpha }} * (1.0 - cosine) + {{ beta }} * mse, 0.0, 0.0, 0.0));
        cosine_store(0u, vec4<f32>(cosine, 0.0, 0.0, 0.0));
        mse_store(0u, vec4<f32>(mse, 0.0, 0.0, 0.0));
    }
{% endif %}
}
