{# All rows by one workgroup; or `each` rows a workgroup, into a row of `parts`; or the sum of those parts, `rows` being 1. #}
// Mean cosine, mean squared error, loss. An invocation adds up at most {{ (each + lanes - 1) // lanes }} rows, in blocks of {{ block }}.
{# Inside: row < rows. `parts` has a row for each workgroup; the three scalars have one vec4 each. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% if from_parts %}
    let sums = rows_load(0u);
{% else %}
    let group = group_id(wid);
    let end = min((group + 1u) * {{ each }}u, {{ rows }}u);
    var sums = vec4<f32>();
    for (var begin = group * {{ each }}u + lid; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part = vec4<f32>();
        for (var row = begin; row < stop; row += {{ lanes }}u) {
            let r = rows_load(row * rows_stride);
            part += vec4<f32>(r.x / (r.y * r.z), r.w, 0.0, 0.0);
        }
        sums += part;
    }
    sums = reduce(sums, lid);
{% endif %}
{% if groups > 1 %}
    if (lid == 0u && group < {{ groups }}u) {
        parts_store(group * parts_stride, sums);
        for (var col = 1u; col < parts_stride; col++) {
            parts_store(group * parts_stride + col, vec4<f32>());
        }
    }
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
