// The sum of a vector by one workgroup, optionally its square root. An invocation adds up {{ (used + lanes - 1) // lanes }} vec4s, in blocks of {{ block }}.
{% include "shared/nan" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(local_invocation_index) lid: u32) {
    var sum = vec4<f32>();
{% if used > block * lanes %}
    for (var begin = lid; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        var part = vec4<f32>();
        for (var col = begin; col < stop; col += {{ lanes }}u) {
            part += x_load(col);
        }
        sum += part;
    }
{% else %}
    for (var col = lid; col < {{ used }}u; col += {{ lanes }}u) {
        sum += x_load(col);
    }
{% endif %}
    let total = across(reduce(sum, lid));
    if (lid == 0u) {
        y_store(0u, vec4<f32>({% if root %}nan_of(sqrt(total), total){% else %}total{% endif %}, 0.0, 0.0, 0.0));
    }
}
